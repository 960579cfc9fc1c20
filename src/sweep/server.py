"""The first import of the server from which training processes are forked.

The server itself looks for its parent only when all its imports are done, which takes many seconds.
"""

import os

from src.common.environment import code_digest
from src.common.orphans import end_with

end_with(os.getppid())
# Every process that is forked from here runs the code as it is now.
code_digest()
