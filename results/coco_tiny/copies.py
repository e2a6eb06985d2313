"""python copies.py COCO_TINY OUT: both lists of COCO_TINY, and copies of all their images as a list `again`.

Training images are refused as a test; these copies show whether a detector has learned its training images by heart.
"""

import json
import shutil
import sys
from pathlib import Path

root, out = map(Path, sys.argv[1:])
shutil.copytree(root, out)
lists = [json.loads((root / f"annotations/instances_{name}.json").read_text()) for name in ("train2017", "val2017")]
for name in ("train2017", "val2017"):
    shutil.copytree(root / name, out / "again", dirs_exist_ok=True)
again = lists[0] | {key: lists[0][key] + lists[1][key] for key in ("images", "annotations")}
(out / "annotations/instances_again.json").write_text(json.dumps(again))
