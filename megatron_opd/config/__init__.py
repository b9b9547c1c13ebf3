"""The configuration of a run: its schema, how it is read, and what has to hold between its fields.

- `schema`: every key with its type, unit, default and range; the larger sections are in `rollout` and `objective`,
  what they share in `section`.
- `presets`: named settings of the objective.
- `load`: YAML file + `a.b=value` overrides -> `Config`, and back to the run directory.
- `checks`: conditions that span several fields, the models and the number of processes; `server_checks`: those of
  SGLang servers.

Imports `errors` only; never models, data or anything above them.
"""
