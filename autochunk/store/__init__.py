"""What is remembered: measurements, the profiles they make up, and where those are kept."""
