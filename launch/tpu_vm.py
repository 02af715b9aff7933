r"""Runs on a Cloud TPU slice, from its creation to its deletion, with gcloud.

python -m launch.tpu_vm --name=gr2 --zone=us-central2-b --topology=v5p:4x4x4 \
  --setup='mountpoint -q /mnt || sudo mount ADDRESS:/runs /mnt' -- \
  --config=configs/rl.py --workdir=/mnt/runs

Creates the slice as a queued resource (or takes the one with that name), copies
the last commit of the project to every host, installs it, runs on all hosts,
and starts again when the run was preempted; a slice that was taken away is
created anew. It must stay up meanwhile: give it a terminal that does.
"""

import shlex

from launch import commands, slices

# gcloud returns the code of the first host, by number, whose code is not 0. The
# pseudo-terminal (-tt) ends the processes whose connection is lost.
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
    sleep 60  # A slice that was taken away is not reported at once.
    [ "$(state)" = ACTIVE ] && break
  fi
done
{end}
exit $code
"""


def script(args, words: list[str]) -> str:
  """All that is done.

  Args:
    args: the launcher's flags.
    words: the flags of gr2_jax.main.
  """
  found = slices.find(args.topology)
  zone = [f'--zone={args.zone}']
  zone += [f'--project={args.project}'] if args.project else []
  archive = f'gr2_jax-{args.name}.tar.gz'
  unpack = (
    f'mkdir -p ~/gr2_jax && tar -xzf ~/{archive} -C ~/gr2_jax && cd ~/gr2_jax'
  )
  setup = [*args.setup, unpack, commands.install('demo,tpu')]
  train = commands.train(words, '.venv/bin/python')
  if args.delete:
    end = 'delete'
  else:
    end = f'echo {args.name} is kept, and costs'
  return _SCRIPT.format(
    name=args.name,
    where=f'{args.name} {shlex.join(zone)}',
    zone=shlex.join(zone),
    accelerator=found.accelerator,
    runtime=found.runtime,
    spot=' \\\n    --spot' if args.spot else '',
    archive=f'"${{TMPDIR:-/tmp}}/{archive}"',
    setup=shlex.quote(' && '.join(setup)),
    train=shlex.quote(f'cd ~/gr2_jax && exec {train}'),
    restarts=args.restarts,
    lost=commands.IS_LOST,
    end=end,
  )


def launch(flags: list[str], words: list[str]) -> int:
  """Does all of it, or prints it."""
  parser = commands.Parser(__doc__)
  add = parser.add_argument
  add('--name', type=commands.name, default='gr2', help='Of the slice.')
  add('--zone', required=True)
  add('--project', help="Default: gcloud's.")
  add('--topology', required=True, help='E.g. v5p:4x4x4.')
  add('--spot', action='store_true', help='Cheaper; can be taken away.')
  add(
    '--setup',
    action='append',
    default=[],
    help='A shell line that every host runs first: mount the shared storage.',
  )
  add('--restarts', type=commands.whole(0), default=50)
  add('--delete', action='store_true', help='The slice, at the end.')
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
