"""What is remembered: profiles, where they are kept, and how "auto" is answered from them."""
