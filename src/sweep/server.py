"""The first module that the fork server of the training processes imports.

It makes the server end with the worker that started it from the beginning. By itself the server
would check for its parent only after all imports, which take many seconds.
"""

import gc
import os

from src.common.environment import code_digest
from src.common.orphans import end_with

end_with(os.getppid())
# A collection in the server would leave holes in its pages, which the forked processes then fill:
# each would get copies of them. `src.sweep.job.train` collects again.
gc.disable()
# Cached here, because every process that is forked from the server runs the code as it is now.
code_digest()
