"""``python -m almrr_ref.demo``."""

import sys

from almrr_ref.demo.surfaces import main

if __name__ == "__main__":
    sys.exit(main())
