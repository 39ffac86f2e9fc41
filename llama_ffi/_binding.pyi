# The compiled module has no types of its own; the modules beside it give them.
from typing import Any

ffi: Any
lib: Any
