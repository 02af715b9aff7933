r"""Runs on GPUs or TPUs of any cloud that SkyPilot knows.

python -m launch.skypilot --gpus=H100:8 --nodes=2 --bucket=gs://NAME -- \
  --config=configs/rl.py --workdir=/mnt/runs

Writes the task as YAML and starts it as a managed job: SkyPilot finds the
machines, and others when they are taken away or the run was preempted. With
`--sky-cluster` the machines stay, and nothing is started again.
"""

import yaml

from launch import commands, slices

_PORT = 8476  # of the coordinator, between the nodes

# Who a process is, on GPUs; on a TPU slice JAX must find out by itself, for
# there the numbers belong to the hosts.
_CLUSTER = (
  f'--coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n1):{_PORT}" '
  '--num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
)


def task(args, words: list[str]) -> dict:
  """The task, as SkyPilot's YAML has it.

  Args:
    args: the launcher's flags.
    words: the flags of gr2_jax.main.

  Raises:
    LaunchError: flags that do not go together.
  """
  resources = {
    'use_spot': args.spot,
    'job_recovery': {'recover_on_exit_codes': [commands.RESTART]},
  }
  if args.infra:
    resources['infra'] = args.infra
  if args.topology:
    if args.nodes > 1:
      raise commands.LaunchError(
        '--nodes: a TPU slice is one node to SkyPilot; leave it out, and take '
        'a larger --topology'
      )
    found = slices.find(args.topology)
    resources['accelerators'] = f'tpu-{found.accelerator}'
    resources['accelerator_args'] = {'runtime_version': found.runtime}
  else:
    resources['accelerators'] = args.gpus
  storage = (
    {'volumes': {args.mount: args.volume}}
    if args.volume
    else {'file_mounts': {args.mount: {'source': args.bucket, 'mode': 'MOUNT'}}}
  )
  cluster = '' if args.topology else _CLUSTER
  return {
    'name': args.name,
    'num_nodes': args.nodes,
    'resources': resources,
    'workdir': '.',
    **storage,
    'setup': commands.install('demo,tpu' if args.topology else 'demo,gpu'),
    'run': '\n'.join(
      [
        *(f'export {x}' for x in args.env),
        commands.train(words, '.venv/bin/python', cluster),
      ]
    ),
  }


def script(args, words: list[str]) -> str:
  """All that is done: the file is written, and given to SkyPilot."""
  text = yaml.safe_dump(task(args, words), sort_keys=False, width=10**6)
  file = f'"${{TMPDIR:-/tmp}}/gr2_jax-{args.name}.yaml"'
  if args.sky_cluster:
    command = f'sky launch --cluster {args.sky_cluster} {file}'
  else:
    command = f'sky jobs launch --name {args.name} {file}'
  return commands.heredoc(f'cat >{file}', text) + command


def launch(flags: list[str], words: list[str]) -> int:
  """Starts the job, or prints how."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the job.')
  kind = parser.add_mutually_exclusive_group(required=True)
  kind.add_argument('--gpus', help='Kind and number a node, e.g. H100:8.')
  kind.add_argument('--topology', help='Of a TPU slice, e.g. v5e:4x4.')
  add('--nodes', type=commands.whole(1), default=1, help='With GPUs.')
  add('--infra', help='Cloud, region and zone, e.g. gcp/us-central1.')
  add('--spot', action='store_true', help='Cheaper; can be taken away.')
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument('--bucket', help='For the workdir, e.g. gs://NAME.')
  where.add_argument('--volume', help='For the workdir: a SkyPilot volume.')
  add('--mount', default='/mnt/runs', help='Where the storage is seen.')
  add('--env', type=commands.assignment, action='append', default=[])
  add('--sky-cluster', type=commands.name, help='To use or make; not managed.')
  args = parser.parse_args(flags)
  commands.check(words, shared=True, mount=args.mount)
  return commands.run(
    script(args, words),
    args.dry_run,
    'sky',
    'pip install "skypilot[gcp]" (or [aws], [kubernetes], ...), then sky check',
  )


if __name__ == '__main__':
  commands.main(launch)
