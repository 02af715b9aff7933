r"""Runs on GPUs or TPUs of any cloud that SkyPilot supports.

python -m launch.skypilot --gpus=H100:8 --nodes=2 --bucket=gs://NAME -- \
  --config=configs/rl.py --workdir=/mnt/runs

Writes the task as YAML and starts it as a managed job: SkyPilot finds machines,
and finds new ones after a preemption. With `--sky-cluster` the machines stay,
and nothing is restarted.
"""

import yaml

from launch import commands, slices

_PORT = 8476  # of the coordinator, between the nodes

# Flags that identify a process on GPUs. A TPU slice is one node of SkyPilot but
# several hosts, which JAX detects.
_CLUSTER = (
  f'--coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n1):{_PORT}" '
  '--num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
)


def task(args, words: list[str]) -> dict:
  """The content of SkyPilot's YAML file."""
  resources = {
    'use_spot': args.spot,
    'job_recovery': {'recover_on_exit_codes': [commands.RESTART]},
  }
  if args.infra:
    resources['infra'] = args.infra
  if args.topology:
    if args.nodes > 1:
      raise commands.LaunchError(
        '--nodes: a TPU slice is one node of SkyPilot; leave --nodes out, and '
        'choose a larger --topology'
      )
    tpu = slices.find(args.topology)
    resources['accelerators'] = f'tpu-{tpu.accelerator}'
    resources['accelerator_args'] = {'runtime_version': tpu.runtime}
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
  """Writes the YAML file and passes it to SkyPilot."""
  text = yaml.safe_dump(task(args, words), sort_keys=False, width=10**6)
  file = f'"${{TMPDIR:-/tmp}}/gr2_jax-{args.name}.yaml"'
  if args.sky_cluster:
    command = f'sky launch --cluster {args.sky_cluster} {file}'
  else:
    command = f'sky jobs launch --name {args.name} {file}'
  return commands.heredoc(f'cat >{file}', text) + command


def launch(flags: list[str], words: list[str]) -> int:
  """Starts the job, or prints the script."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the job.')
  kind = parser.add_mutually_exclusive_group(required=True)
  kind.add_argument('--gpus', help='Kind and number a node, e.g. H100:8.')
  kind.add_argument('--topology', help='Of a TPU slice, e.g. v5e:4x4.')
  add('--nodes', type=commands.whole(1), default=1, help='With GPUs.')
  add('--infra', help='Cloud, region and zone, e.g. gcp/us-central1.')
  add('--spot', action='store_true', help='Cheaper, but preemptible.')
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument('--bucket', help='For the workdir, e.g. gs://NAME.')
  where.add_argument('--volume', help='For the workdir: a SkyPilot volume.')
  add('--mount', default='/mnt/runs', help='Mount point of the storage.')
  add('--env', type=commands.assignment, action='append', default=[])
  add(
    '--sky-cluster', type=commands.name, help='To use or create; not managed.'
  )
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
