r"""Submits a run to SLURM, with one process per GPU.

python -m launch.slurm --nodes=2 --gpus-per-node=8 --time=24:00:00 \
  --setup='source .venv/bin/activate' -- --config=configs/rl.py

Under SLURM, JAX assigns the i-th GPU of a node to its i-th process, so every
process must see all GPUs. Run this in the project, on storage that the nodes
share.
"""

import shlex

from launch import commands

_SCRIPT = """\
#!/bin/bash
{options}

{environment}
{setup}
# When one process is lost, the others save and stop by themselves: SLURM must
# not kill them, nor those that still run when the first is done.
srun --kill-on-bad-exit=0 --wait=0 --gpu-bind=none{cpus} \\
  {command}
code=$?
# srun returns the highest code of all processes.
if {{ {lost}; }} &&
   [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def script(args, words: list[str]) -> str:
  """The batch script."""
  options = {
    'job-name': args.name,
    'nodes': args.nodes,
    'ntasks-per-node': args.gpus_per_node,
    'gpus-per-node': args.gpus_per_node,
    'cpus-per-task': args.cpus_per_gpu,
    'time': args.time,
    'partition': args.partition,
    'account': args.account,
    'output': '%x-%j.out',
    'open-mode': 'append',
    # The processes, not the script, get SIGTERM before the time limit.
    'signal': f'TERM@{args.warning}',
  }
  lines = [f'--{k}={v}' for k, v in options.items() if v is not None]
  lines += ['--requeue', *args.sbatch]
  for line in lines:
    if len(shlex.split(line, comments=True)) != 1:
      raise commands.LaunchError(
        f'{line!r} is not one word, as an #SBATCH line must have'
      )
  environment = [
    # Lets XLA overlap communication with computation.
    'XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"',
    'XLA_PYTHON_CLIENT_MEM_FRACTION=0.9',
    *args.env,
  ]
  cpus = args.cpus_per_gpu  # srun does not inherit it from sbatch.
  return _SCRIPT.format(
    options='\n'.join(f'#SBATCH {line}' for line in lines),
    environment='\n'.join(f'export {x}' for x in environment),
    setup='\n'.join(args.setup),
    cpus='' if cpus is None else f' --cpus-per-task={cpus}',
    command=commands.train(words, 'python'),
    lost=commands.IS_LOST,
    restarts=args.restarts,
  )


def launch(flags: list[str], words: list[str]) -> int:
  """Submits the batch script, or prints it."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the job.')
  add('--nodes', type=commands.whole(1), required=True)
  add('--gpus-per-node', type=commands.whole(1), default=8)
  add('--cpus-per-gpu', type=commands.whole(1))
  add('--time', help='Limit of one run, e.g. 24:00:00.')
  add('--partition')
  add('--account')
  add('--sbatch', action='append', default=[], help='A further #SBATCH option.')
  add('--setup', action='append', default=[], help='A shell line to run first.')
  add(
    '--env',
    type=commands.assignment,
    action='append',
    default=[],
    help='NAME=VALUE of every process, e.g. NCCL_DEBUG=WARN.',
  )
  add(
    '--warning',
    type=commands.whole(1),
    default=120,
    help='Seconds before the time limit at which the run saves and stops.',
  )
  add(
    '--restarts',
    type=commands.whole(0),
    default=50,
    help='How often the job is requeued.',
  )
  args = parser.parse_args(flags)
  commands.check(words, shared=False)
  return commands.run(
    commands.heredoc('sbatch', script(args, words)),
    args.dry_run,
    'sbatch',
    'run this where SLURM is installed, on a login node',
  )


if __name__ == '__main__':
  commands.main(launch)
