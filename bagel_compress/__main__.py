import sys

from bagel_compress.cli import main

sys.exit(main())
