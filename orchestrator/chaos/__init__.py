"""`arriero chaos`: faults done on purpose to small real runs, and what came of each: docs/chaos.md.

`plan` lists the faults, `scenes` and `slurm_scenes` do them, each scene to one run, `stage` launches that run and watches it,
`judge` makes the rows, `campaign` runs the scenes beside each other. `kills` is the endless form: random kills.
"""
