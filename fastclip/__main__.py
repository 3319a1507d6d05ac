"""python -m fastclip"""

from fastclip.cli import main

main()
