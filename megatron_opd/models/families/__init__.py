"""Model families: which Hugging Face tensors make up which megatron parameter, one table a file.

- `rows`: what a table is made of: its rows, and the rows that most families share.
- every other file: one family, as a constant `FAMILY`. To support another family, add its file (and a case to the
  tests' `tests/checkpoint/models.py`): nothing else lists them.

Plain data: nothing here may import anything else of the package.
"""

import importlib
import pkgutil

from megatron_opd.models.families.rows import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        importlib.import_module(f"{__name__}.{file.name}").FAMILY
        for file in pkgutil.iter_modules(__path__)
        if file.name != "rows"
    )
}
"""Every supported family by its `model_type` in config.json."""
