"""``watch``: a service that measures what is missing, stale or unfinished while a device is idle.

What to do next (``todo``) and whether the device is idle (``idle``) are decided by plain data;
``eyes`` looks, ``job`` measures in a process of its own that ``running`` starts and ends.
"""
