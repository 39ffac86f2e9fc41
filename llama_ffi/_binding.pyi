# The compiled module has no types. The modules beside it add them.
from typing import Any

ffi: Any
lib: Any
