"""How tokens move and multiply: one public function an op, a torch reference that defines it."""

from adaptive.ops import operators as operators  # declares them
