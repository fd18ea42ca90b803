import sys

from loratory.cli import main

sys.exit(main())
