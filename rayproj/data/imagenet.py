"""ImageNet as it is kept on disks: a folder for each class, `n01440764` and so on, with images in it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from rayproj.data.dataset import Field, Header
from rayproj.data.encodings import of_picture
from rayproj.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png")
CUT = 224 / 256  # of the shorter side is left by the cut at the middle, as is usual


class ImageFolders:
    """The images of class folders, of all below one folder, in the order of their names; read as they are asked for.

    Attributes:
        header: its classes are numbered as ImageNet's are, in the order of the folders, and called "ImageNet <number>";
            where there are others than a thousand folders, by the folders' names.
        files: path of each image below the folder.

    Raises:
        UserError: the folder has no class folders, or these no images.
    """

    def __init__(self, folder: str, size: int = 224, shard_size: int = 256) -> None:
        root = Path(folder)
        names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        names = [name for name in names if re.fullmatch(r"n\d{8}", name)]
        found = [(number, p) for number, name in enumerate(names) for p in sorted((root / name).iterdir())]
        found = [(number, p) for number, p in found if p.suffix.lower() in SUFFIXES]
        if not found:
            raise UserError(
                f"'{folder}' has no folders such as n01440764 with images in them; give that of ImageNet's validation "
                "images, sorted into a folder for each class."
            )
        self.uri, self.root, self.size = folder, root, size
        self.labels = np.array([number for number, _ in found], np.int64)
        self.files = [p.relative_to(root).as_posix() for _, p in found]
        classes = tuple(f"ImageNet {k}" for k in range(1000)) if len(names) == 1000 else tuple(names)
        fields = {"image": Field("jpg", (3, size, size)), "label": Field("int"), "image_id": Field("str")}
        self.header = Header(root.name, fields, len(found), shard_size, classes)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As `Reader.gather`.

        Raises:
            UserError: a file is no image.
        """
        indices = np.asarray(indices, np.int64)
        files = [self.files[i] for i in indices]
        images = np.stack([self._read(name) for name in files])
        return {"image": images, "label": self.labels[indices], "image_id": np.array(files, object), "index": indices}

    def _read(self, name: str) -> np.ndarray:
        try:
            picture = Image.open(self.root / name).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"The image '{self.root / name}' cannot be read ({error}); fetch it again.") from error
        width, height = picture.size
        cut = CUT * min(width, height)
        left, top = (width - cut) / 2, (height - cut) / 2
        box = (left, top, left + cut, top + cut)
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return of_picture(picture)
