"""Python imports this at its start in every process that a test launches: each line is one write.

torchrun starts its workers with `python -u`, where one `print` is several writes, between which the lines
of two processes mix. Here a line is written when it is whole, so that a process that is killed loses none.
"""

import sys

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(line_buffering=True, write_through=False)
