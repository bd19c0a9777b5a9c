"""Functions that are not attention, measured: from programs that they left where they were missed.

Nothing of the user's code is needed, or imported, for it.
"""
