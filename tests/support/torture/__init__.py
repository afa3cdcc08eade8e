"""`make torture`: hurt the line as machines and people may, and count what it does.

Each kind is a function ``(world, count, random) -> Counts`` in a file of its own. A run is *silent*
if it went on with other bytes than an undisturbed run and said nothing: that must never happen.
"""
