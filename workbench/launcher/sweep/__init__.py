"""One stage repeated over a grid of arguments.

The driver is the `job`: it is given the `runs` of the `grid`, skips those that are finished, and has the others run
`in_place`, in a `pool` of worker processes, or `on_ray`. A worker is a `process` that executes one `task` file and
reports through a progress file and its record; `progress` draws these files, `summary` makes the sweep's record.

    driver (job) -- .task.json -----> worker (__main__): run_stage
           <------- .progress.json ---
           <------- record.json ------

Only the driver starts and stops workers. A worker ends itself when the driver is gone. A run that died is started again
and resumes from its folder, as any stage does.
"""
