"""One optimizer update of the student, and everything a run is assembled from.

- `student`: the trained model with its DDP wrapper, optimizer and learning-rate schedule.
- `update`: microbatches and teacher payloads -> loss, gradients, one optimizer step, statistics.
- `score`: log-probabilities of the sampled tokens, or likeliest ids, under a model as it is now.
- `agreement`: whether rollout engine and training engine give tokens the same probability.
- `router_metrics`: how evenly a student with experts used them.
- `job`: config -> the objects of a run (groups, student, teacher, engine, prompts); `models`: its models;
  `texts`: its tokenizer and prompts; `relay`: the process groups that a teacher in another layout adds.
- `teacher_process`: what a process does that is only the teacher's.
- `saving`: the saves of a run, begun after one step and completed after another, and the state it goes on from.
- `evaluating`: held-out reverse KL and the scores of tasks while a run trains.
- `serving`, `teaching`: the SGLang servers of a run, those that draw and those of the teacher.

Only `train` and the command line import from here.
"""
