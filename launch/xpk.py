r"""Submits a run to TPUs of Google Kubernetes Engine, through xpk.

python -m launch.xpk --name=gr2 --cluster=my-cluster --zone=ZONE \
  --topology=v5e:16x16 --docker-image=IMAGE --storage=STORAGE -- \
  --config=configs/rl.py --workdir=/mnt/runs

The image contains the project (launch/Dockerfile). `xpk storage attach` has
attached the storage, which holds the workdir, to the cluster.
"""

import shlex

from launch import commands, slices


def script(args, words: list[str]) -> str:
  """The xpk command; a LaunchError for a slice that xpk does not offer."""
  tpu = slices.find(args.topology)
  if args.topology in ('v5e:1x1', 'v5e:2x2'):
    raise commands.LaunchError(
      f'--topology={args.topology}: xpk offers no v5e slice under v5e:2x4'
    )
  # xpk runs the command in a subshell; `exec` lets SIGTERM reach Python.
  command = 'exec ' + commands.train(words, 'python')
  options = [
    f'--workload={args.name}',
    f'--cluster={args.cluster}',
    f'--zone={args.zone}',
    *([f'--project={args.project}'] if args.project else []),
    f'--tpu-type={tpu.accelerator}',
    f'--num-slices={args.slices}',
    f'--docker-image={args.docker_image}',
    *(f'--storage={x}' for x in args.storage),
    *(['--spot'] if args.spot else []),
    f'--max-restarts={args.restarts}',
    # In addition to xpk's own: 42 and 127 to 255.
    f'--restart-on-exit-codes={commands.RESTART}',
    f'--termination-grace-period-seconds={args.grace}',
    # Kubernetes expands $(NAME) in a command, and $$ to $.
    '--command=' + command.replace('$', '$$'),
  ]
  return ' \\\n  '.join(['xpk workload create', *map(shlex.quote, options)])


def launch(flags: list[str], words: list[str]) -> int:
  """Creates the workload, or prints the command."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the workload.')
  add('--cluster', type=commands.name, required=True)
  add('--zone', required=True)
  add('--project', help="Default: gcloud's.")
  add('--topology', required=True, help='Of one slice, e.g. v5p:4x4x4.')
  add('--slices', type=commands.whole(1), default=1)
  add('--docker-image', required=True)
  add('--storage', action='append', default=[], help='Attached to the cluster.')
  add('--spot', action='store_true')
  add('--restarts', type=commands.whole(0), default=50)
  add(
    '--grace',
    type=commands.whole(1),
    default=120,
    help='Seconds for a process to save.',
  )
  args = parser.parse_args(flags)
  commands.check(words, shared=True)
  return commands.run(
    script(args, words),
    args.dry_run,
    'xpk',
    'pip install xpk, and the gcloud CLI (cloud.google.com/sdk/docs/install)',
  )


if __name__ == '__main__':
  commands.main(launch)
