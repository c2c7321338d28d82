# SPDX-License-Identifier: Apache-2.0
"""The folder that ``monailabel start_server --app`` takes: it holds no code but the import of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from monai_synth.atomic import write_bytes
from monai_synth.errors import UserError

MAIN = '''# SPDX-License-Identifier: Apache-2.0
"""App of MONAI Label that serves bundles of monai_synth."""

from monai_synth.label.app import SynthApp

__all__ = ["SynthApp"]
'''

# What MONAI Label imports, without its scribbles, whole-slide, SAM and tracking parts.
REQUIREMENTS = """\
pydicom<3
dicomweb-client<0.61
google-auth
jsonschema
SimpleITK
fastapi
uvicorn
python-multipart
pydantic-settings
pyjwt
requests
requests-toolbelt
cachetools
passlib
schedule
timeloop
watchdog
filelock
itk-io
pynrrd
girder-client
psutil
expiring_dict
shapely
"""

README = """# monai_synth in MONAI Label

An environment of its own, since MONAI Label needs pydicom below 3; the first line makes it from a checkout of
monai_synth:

```bash
python3 -m venv .venv-label && . .venv-label/bin/activate && pip install CHECKOUT
pip install --no-deps 'monailabel==0.8.5' 'pydicom-seg==0.4.1'
pip install -r requirements.txt
```

pip tells that monai_synth and pydicom-seg want other versions; nothing that is used here needs them.

```bash
monailabel start_server --app . --studies STUDIES --host 127.0.0.1 --port 8000 --conf bundles lsdm,jdm
```

`--conf bundles lsdm=/models/lsdm,jdm` names the folder of trained files; without it the last training of the bundle
is taken. A model that was trained by this app comes before both; delete its folder in `model/` to go back.
`--conf bundles_dir DIR` is where the bundles' folders lie (default: bundles/ of the folder that the server starts in).
"""


def write_label_app(out: str, *, overwrite: bool = False) -> Path:
    """Write the app's folder.

    Args:
        out: folder; new or empty.
        overwrite: replace the app's own files in a folder that holds others, such as models that it trained.

    Returns:
        The folder.

    Raises:
        UserError: it holds something, or cannot be written.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{out} is a file; give a new folder for the app")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; give a new folder, or --overwrite to replace the app's own files in it")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {"README.md": README.encode(), "requirements.txt": REQUIREMENTS.encode(), "main.py": MAIN.encode()}
        for name, content in files.items():
            write_bytes(folder / name, content)
    except OSError as error:
        if new and os.path.isdir(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"cannot write the app to {out} ({error.strerror}); give a folder that can be written"
        ) from error
    return folder
