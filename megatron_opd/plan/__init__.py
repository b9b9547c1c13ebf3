"""`megatron-opd plan`: memory, work, traffic and time of a run, predicted from its configuration alone.

Nothing is run and no weights are read: of every model only config.json. Each number is a formula, written down where
it is computed:

- `setting`: the checked run that is planned, and how many tokens a step has.
- `parameters`: the parameters that a rank holds, from the family's table of tensors.
- `activations`: what the forward pass keeps for the backward pass, by recompute policy and kernels.
- `memory`: bytes of a rank by part, and the phase of the step in which most of them are alive together.
- `flops`, `traffic`: work of a rank and what it sends to which process group, by phase of the step.
- `hardware`, `timing`: the numbers of a device (`devices/*.yaml`), and the seconds of a step on it.
- `plan`: all of it together, of every pipeline stage. `advice`: changes that help, found by planning them too.
- `table`: the report.

Nothing here starts a process group. Only the command line imports from here (and the benches, which measure the same).
"""
