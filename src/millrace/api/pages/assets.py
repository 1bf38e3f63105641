"""Scripts and styles: under a URL that names their bytes, so that browsers keep them for good."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from millrace.core.errors import NotFoundError

FOLDER = Path(__file__).parents[2] / "static"
PREFIX = "/static/"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Asset(NamedTuple):
    """One file, plain and compressed."""

    url: str
    plain: bytes
    packed: bytes
    media_type: str
    tag: str


class Assets:
    """Every script, style and picture below a folder, read once.

    Args:
        folder: Where they lie.

    Example:
        >>> assets = Assets()
        >>> assets.url("style.css").startswith("/static/style.")
        True
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in _TYPES}
        self._by_name = {name: _read(name, path) for name, path in names.items()}
        self._by_url = {asset.url: asset for asset in self._by_name.values()}

    def url(self, name: str) -> str:
        """Where a file is, for example `style.css`."""
        return self._by_name[name].url

    async def respond(self, request: Request) -> Response:
        """The file of a URL.

        Raises:
            NotFoundError: No file has this name and these bytes.
        """
        asset = self._by_url.get(request.url.path)
        if asset is None:
            raise NotFoundError(f"there is no {request.url.path}", hint="reload the page: it names the files of today")
        headers = {
            "Cache-Control": "public, max-age=31536000, immutable",
            "ETag": f'"{asset.tag}"',
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
        }
        if asset.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(asset.packed, media_type=asset.media_type, headers={**headers, "Content-Encoding": "gzip"})
        return Response(asset.plain, media_type=asset.media_type, headers=headers)


def _read(name: str, path: Path) -> Asset:
    data = path.read_bytes()
    tag = hashlib.sha256(data).hexdigest()[:12]
    url = f"{PREFIX}{name.removesuffix(path.suffix)}.{tag}{path.suffix}"
    return Asset(url, data, gzip.compress(data, 9, mtime=0), _TYPES[path.suffix], tag)
