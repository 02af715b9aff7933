r"""Creates a Cloud TPU slice with gcloud and runs on it.

python -m launch.tpu_vm --name=gr2 --zone=us-central2-b --topology=v5p:4x4x4 \
  --setup='mountpoint -q /mnt || sudo mount ADDRESS:/runs /mnt' -- \
  --config=configs/rl.py --workdir=/mnt/runs

Creates the slice as a queued resource (or takes the existing one of that name),
copies the last commit of the project to every host, installs it and runs it on
all hosts. After a preemption it runs again, on a new slice if the old one is
gone. The launcher must keep running: start it in tmux.
"""

import shlex

from launch import commands, slices

# gcloud returns the code of the first host whose code is not 0. A process whose
# connection is lost ends with its pseudo-terminal (-tt).
_SCRIPT = """\
state() {{
  gcloud compute tpus queued-resources describe {where} \\
    '--format=value(state.state)' 2>/dev/null
}}
create() {{
  gcloud compute tpus queued-resources create {where} \\
    --node-id={name} \\
    --accelerator-type={accelerator} \\
    --runtime-version={runtime}{spot}
}}
delete() {{
  gcloud compute tpus queued-resources delete {where} --force --quiet
}}
on_all_hosts() {{
  gcloud compute tpus tpu-vm ssh {where} --worker=all --ssh-flag=-tt \\
    --command="$1" </dev/null
}}
wait_for_slice() {{
  while :; do
    case "$(state)" in
      ACTIVE) return ;;
      '') create || return ;;
      FAILED|SUSPENDED) delete || return ;;
      *) sleep 30 ;;
    esac
  done
}}
copy() {{
  git archive --format=tar.gz --output={archive} HEAD &&
    gcloud compute tpus tpu-vm scp {archive} {name}: \\
      {zone} --worker=all
}}
setup={setup}
train={train}

for attempt in $(seq 0 {restarts}); do
  wait_for_slice || exit 1
  copy && on_all_hosts "$setup" && on_all_hosts "$train"
  code=$?
  [ "$code" -eq 0 ] && break
  if ! {{ {lost}; }}; then
    sleep 60  # The state of a preempted slice changes with a delay.
    [ "$(state)" = ACTIVE ] && break
  fi
done
{end}
exit $code
"""


def script(args, words: list[str]) -> str:
  """Creates the slice, installs, runs, and deletes the slice if required."""
  tpu = slices.find(args.topology)
  zone = [f'--zone={args.zone}']
  zone += [f'--project={args.project}'] if args.project else []
  archive = f'gr2_jax-{args.name}.tar.gz'
  unpack = (
    f'mkdir -p ~/gr2_jax && tar -xzf ~/{archive} -C ~/gr2_jax && cd ~/gr2_jax'
  )
  setup = [*args.setup, unpack, commands.install('demo,tpu')]
  train = commands.train(words, '.venv/bin/python')
  return _SCRIPT.format(
    name=args.name,
    where=f'{args.name} {shlex.join(zone)}',
    zone=shlex.join(zone),
    accelerator=tpu.accelerator,
    runtime=tpu.runtime,
    spot=' \\\n    --spot' if args.spot else '',
    archive=f'"${{TMPDIR:-/tmp}}/{archive}"',
    setup=shlex.quote(' && '.join(setup)),
    train=shlex.quote(f'cd ~/gr2_jax && exec {train}'),
    restarts=args.restarts,
    lost=commands.IS_LOST,
    end='delete'
    if args.delete
    else f'echo {args.name} is kept and costs money',
  )


def launch(flags: list[str], words: list[str]) -> int:
  """Runs the script, or prints it."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the slice.')
  add('--zone', required=True)
  add('--project', help="Default: gcloud's.")
  add('--topology', required=True, help='E.g. v5p:4x4x4.')
  add('--spot', action='store_true', help='Cheaper, but preemptible.')
  add(
    '--setup',
    action='append',
    default=[],
    help='A shell line that every host runs first: mount the shared storage.',
  )
  add('--restarts', type=commands.whole(0), default=50)
  add('--delete', action='store_true', help='Delete the slice at the end.')
  args = parser.parse_args(flags)
  commands.check(words, shared=True)
  return commands.run(
    script(args, words),
    args.dry_run,
    'gcloud',
    'install the gcloud CLI (cloud.google.com/sdk/docs/install)',
  )


if __name__ == '__main__':
  commands.main(launch)
