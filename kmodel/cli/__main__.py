"""`python -m kmodel.cli` is the kmodel command."""

import sys

from kmodel.cli.main import main

sys.exit(main())
