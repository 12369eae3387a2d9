"""What can go wrong with a command, made to go wrong: bad inputs, kills and full disks, and the count of what was lost.

`python -m faults` is the long form (`make faults`); the tests of this folder are the short one.
"""
