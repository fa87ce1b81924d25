"""The settings of a server: its model, the limits of requests, and the access control."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..app.engine import Resources
from ..app.library import Library, Limits
from ..app.request import Request

LOCAL = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold the settings of a server.

    ``base`` is a request with the model and the default settings. A ``host`` other than this machine needs an
    ``api_key``. ``cors`` are the allowed origins of other pages, ``queue`` is the number of jobs that may wait. After
    ``idle`` seconds without a job the networks are freed. With ``safety_check``, images are withheld if the safety
    checker of the checkpoint, or ``safety_model``, flags them.

    Raises ValueError for such a ``host`` without a key.
    """

    base: Request
    library: Library = field(default_factory=Library)
    limits: Limits = field(default_factory=Limits)
    resources: Resources = field(default_factory=Resources)
    host: str = "127.0.0.1"
    port: int = 7860  # 0 is any free port
    api_key: str | None = None
    cors: Sequence[str] = ()
    queue: int = 32
    idle: float | None = None
    device: str | None = None
    preload_models: bool = False
    safety_check: bool = False
    safety_model: str | None = None

    def __post_init__(self) -> None:
        if self.host not in LOCAL and not self.api_key:
            raise ValueError(f"host {self.host} is open to other machines: give an api_key too")
