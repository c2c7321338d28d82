# SPDX-License-Identifier: Apache-2.0
"""The datastore of a folder, which takes nothing but images and label maps under plain names.

MONAI Label's own writes any file to any path that a request names, and forgets cases when two processes add some at
once: the server and a batch of it each write the whole list as they know it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import HTTPException
from filelock import FileLock
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from monai_synth.errors import UserError
from monai_synth.label.maps import check_image
from monai_synth.label.parameters import check_tag
from monai_synth.label.store import check_file_name

T = TypeVar("T")


class CaseFolder(LocalDatastore):
    """A folder of cases.

    What cannot be stored ends in an HTTPException: 400 with one message, or 404 where a case is not there. Nothing is
    written then.
    """

    def __init__(self, datastore_path: str, **options: Any) -> None:
        os.makedirs(datastore_path, exist_ok=True)
        self._alone = FileLock(os.path.join(datastore_path, ".lock_cases"))  # one thread of one process may hold it
        super().__init__(datastore_path, **options)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        def action() -> str:
            check_file_name("the case id", image_id)
            check_image(image_filename)
            return super(CaseFolder, self).add_image(image_id, image_filename, image_info)

        return self._stored(action)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        def action() -> str:
            tag = label_tag.value if isinstance(label_tag, DefaultLabelTag) else label_tag
            check_tag("tag", tag)
            check_image(label_filename)
            return super(CaseFolder, self).save_label(image_id, label_filename, tag, label_info)

        return self._stored(action)

    def remove_image(self, image_id: str) -> None:
        self._stored(lambda: super(CaseFolder, self).remove_image(image_id))

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        self._stored(lambda: super(CaseFolder, self).update_image_info(image_id, info))

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        self._stored(lambda: super(CaseFolder, self).update_label_info(label_id, label_tag, info))

    def _reconcile_datastore(self) -> None:
        with self._alone:
            super()._reconcile_datastore()

    def _stored(self, action: Callable[[], T]) -> T:
        """Change the list of cases as it lies on disk, alone."""
        with self._alone:
            self._init_from_datastore_file()
            try:
                return action()
            except UserError as error:
                raise HTTPException(status_code=400, detail=str(error)) from error
            except (ImageNotFoundException, LabelNotFoundException) as error:
                raise HTTPException(status_code=404, detail="the datastore has no such case or label") from error
