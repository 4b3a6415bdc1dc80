"""`llmrl launch --slurm` and `--k8s`: an sbatch script and a Kubernetes manifest. Both run `llmrl launch` once on every node, so that servers and
ranks are started, watched and ended there as they are on one machine. What is written is checked first, as far as this machine can.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from llmrl.launch_plan import Asked, Plan
from llmrl.records import InputError

SLURM = r"""#!/usr/bin/env bash
# {{ title }}
# Submit with: sbatch THIS_FILE. What is marked CHANGE is a guess.
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
# One `llmrl launch` a node; it starts the node's {{ processes }}.
#SBATCH --ntasks-per-node=1
{% if gpus %}
#SBATCH --gpus-per-node={{ gpus }}
{% endif %}
# CHANGE: the cores of a node, which its processes share; and the time.
#SBATCH --cpus-per-task={{ cpus }}
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -euo pipefail

# Recipe, data and run directory are relative to this folder, on a disk that all nodes see.
cd "$SLURM_SUBMIT_DIR"
export PATH={{ bin }}:"$PATH"  # CHANGE: the environment that llmrl is installed in
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over by itself

mode={{ mode }}
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f {{ manifest }} ]; then
    mode=--resume  # requeued: go on from the last checkpoint
fi

# A file a node here; below it a folder a node, with a file for every rank{{ " and every vLLM server" if vllm }}.
logs={{ logs }}
mkdir -p "$logs"

{% if nodes > 1 %}
# The first node is where the others meet (torchrun's c10d rendezvous). Ports come from the job's number, so that jobs do not clash.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
master="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"
{% if vllm %}
all=$(IFS=,; echo "${hosts[*]}")  # every process asks the vLLM servers of all nodes
{% endif %}

{% endif %}
# $mode is not quoted: it may be empty. When one node fails, srun ends the others.
srun --kill-on-bad-exit=1 --output="$logs/node-%n.log" \
    {{ command }} \
    --run-id "$SLURM_JOB_ID"{% if nodes > 1 %} --master "$master"{% endif %}{% if vllm and nodes > 1 %} --hosts "$all"{% endif +%}
{%- if vllm %} --vllm-port "$((10000 + SLURM_JOB_ID % 10000))"{% endif %} $mode
"""

K8S = r"""# {{ title }}
# Start with: kubectl apply -f THIS_FILE. What is marked CHANGE is a guess.
apiVersion: v1
kind: Service
metadata:
  name: {{ name }}
spec:
  clusterIP: None                     # headless: pod number k is reached as {{ name }}-k.{{ name }}
  publishNotReadyAddresses: true      # they look for each other while they start
  selector:
    job-name: {{ name }}
  ports:
  - name: rendezvous
    port: 29500
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ name }}
spec:
  completionMode: Indexed             # gives every pod its number: JOB_COMPLETION_INDEX
  completions: {{ nodes }}
  parallelism: {{ nodes }}
  backoffLimit: 0                     # a pod that fails ends the job; start it again with --resume
  template:
    metadata:
      labels:
        app: llmrl
    spec:
      subdomain: {{ name }}
      restartPolicy: Never
      terminationGracePeriodSeconds: 60
      containers:
      - name: llmrl
        image: llmrl:latest           # CHANGE: an image with llmrl{{ ", and vLLM in an environment of its own" if vllm }}
        workingDir: /workspace
        command: [sh, -c]
        args:
        - |
          exec {{ command }} \
            --run-id {{ name }}{{ " " ~ mode if mode }}{% if nodes > 1 %} \
            --node-rank "$JOB_COMPLETION_INDEX" --master {{ name }}-0.{{ name }}:29500{% if vllm %} \
            --hosts {{ hosts }}{% endif %}{% endif +%}
        env:
        - name: PYTHONUNBUFFERED
          value: "1"
        - name: HF_HOME
          value: /workspace/.cache/huggingface
        resources:
          requests:
            cpu: "{{ cpus }}"  # CHANGE
{% if gpus %}
          limits:
            nvidia.com/gpu: {{ gpus }}
{% endif %}
        volumeMounts:
        - name: workspace             # recipes, data, runs{{ ", and weights on their way to the servers" if vllm and nodes > 1 }}: all pods see it
          mountPath: /workspace
        - name: shm
          mountPath: /dev/shm
      volumes:
      - name: workspace
        persistentVolumeClaim:
          claimName: llmrl-workspace  # CHANGE{{ ": it must allow ReadWriteMany" if nodes > 1 }}
      - name: shm                     # {{ "NCCL and weights on their way to the servers need" if vllm and nodes == 1 else "NCCL needs" }} more than 64 MiB
        emptyDir:
          medium: Memory
"""

_LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_COUNT = {"type": "integer", "minimum": 1}


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_QUANTITY = {"type": ["string", "integer"], "pattern": "^[0-9]+(m|Ki|Mi|Gi)?$", "minimum": 1}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = _object("name", name=_LABEL, labels=_STRINGS)
_CONTAINER = _object(
    "name image command args", name=_LABEL, image={"type": "string", "minLength": 1}, workingDir={"type": "string", "pattern": "^/"},
    command=_list({"type": "string"}), args=_list({"type": "string"}),
    env=_list(_object("name value", name={"type": "string", "pattern": "^[A-Z_][A-Z0-9_]*$"}, value={"type": "string"})),
    resources=_object("", requests={"type": "object", "additionalProperties": _QUANTITY}, limits={"type": "object", "additionalProperties": _QUANTITY}),
    volumeMounts=_list(_object("name mountPath", name=_LABEL, mountPath={"type": "string", "pattern": "^/"})),
)  # fmt: skip
_POD = _object(
    "containers restartPolicy subdomain", containers=_list(_CONTAINER), restartPolicy={"enum": ["Never", "OnFailure"]}, subdomain=_LABEL,
    terminationGracePeriodSeconds=_COUNT,
    volumes=_list(_object(
        "name", name=_LABEL, persistentVolumeClaim=_object("claimName", claimName=_LABEL), emptyDir=_object("", medium={"enum": ["", "Memory"]}),
    )),
)  # fmt: skip
SERVICE_SCHEMA = _object(
    "apiVersion kind metadata spec", apiVersion={"const": "v1"}, kind={"const": "Service"}, metadata=_METADATA,
    spec=_object(
        "clusterIP selector ports", clusterIP={"const": "None"}, publishNotReadyAddresses={"type": "boolean"}, selector=_STRINGS,
        ports=_list(_object("name port", name=_LABEL, port={"type": "integer", "minimum": 1, "maximum": 65535})),
    ),
)  # fmt: skip
JOB_SCHEMA = _object(
    "apiVersion kind metadata spec", apiVersion={"const": "batch/v1"}, kind={"const": "Job"},
    metadata=_object("name", name={**_LABEL, "maxLength": 57}, labels=_STRINGS),  # a pod's host name is the job's, a dash and a number
    spec=_object(
        "completionMode completions parallelism template", completionMode={"const": "Indexed"}, completions=_COUNT, parallelism=_COUNT,
        backoffLimit={"type": "integer", "minimum": 0}, template=_object("metadata spec", metadata=_object("", labels=_STRINGS), spec=_POD),
    ),
)  # fmt: skip
"""The structure of batch/v1 Job, as far as we write it; names we do not write are typing errors."""


def write_script(plan: Plan, kind: Literal["slurm", "k8s"], out: Path | None) -> None:
    """Writes it to `out` or stdout, and says on stderr what was checked. Raises InputError where a check finds something."""
    text = slurm_script(plan) if kind == "slurm" else k8s_manifest(plan)
    checked = check_slurm(text) if kind == "slurm" else check_k8s(text)
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
    sys.stderr.write("".join(f"launch: {line}\n" for line in [*([f"wrote {out}"] if out else []), *checked]))


def slurm_script(plan: Plan) -> str:
    return _fill(SLURM, plan, bin=shlex.quote(str(Path(sys.executable).parent)), command=_command(plan.asked, " \\\n    "))


def k8s_manifest(plan: Plan) -> str:
    name = _name(plan.asked)
    hosts = ",".join(f"{name}-{k}.{name}" for k in range(plan.asked.nodes))
    return _fill(K8S, plan, hosts=hosts, command=_command(plan.asked, " \\\n            "))


def _fill(template: str, plan: Plan, **more: Any) -> str:
    import jinja2

    asked = plan.asked
    processes = f"{plan.procs} trainer process{'es' if plan.procs > 1 else ''}"
    if asked.vllm:
        processes += f" and {asked.vllm} vLLM server{'s' if asked.vllm > 1 else ''}"
    mode = "--resume" if asked.resume else "--overwrite" if asked.overwrite else ""
    title = f"{asked.recipe.name} on {asked.nodes} node{'s' if asked.nodes > 1 else ''}: on each {processes}. Written by `llmrl launch`."
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    return environment.from_string(template).render(
        title=title, name=_name(asked), nodes=asked.nodes, gpus=len(plan.devices), cpus=8 * (len(plan.devices) or plan.procs), vllm=asked.vllm,
        processes=processes, mode=mode, manifest=shlex.quote(str(plan.run_dir / "manifest.json")), logs=shlex.quote(str(plan.logs)), **more,
    )  # fmt: skip


def _command(asked: Asked, newline: str) -> str:
    """`llmrl launch` with the recipe and its overrides on one line, and each kind of option on one more."""
    words = [w for w in asked.arguments() if w not in ("--resume", "--overwrite")]
    first = next((k for k, w in enumerate(words) if w.startswith("--")), len(words))
    lines = [["llmrl", "launch", *words[:first]], [w for k in range(first, len(words), 2) for w in words[k : k + 2]]]
    return newline.join(shlex.join(line) for line in lines if line)


def _name(asked: Asked) -> str:
    """A DNS label, as Kubernetes wants it."""
    slug = re.sub(r"[^a-z0-9]+", "-", asked.recipe.stem.lower()).strip("-")
    return f"llmrl-{slug}"[:50].rstrip("-")


def check_slurm(text: str) -> list[str]:
    """What was checked: bash's parser, and the scheduler's own test where there is one. Raises InputError with their words."""
    said = []
    bash, sbatch = shutil.which("bash"), shutil.which("sbatch")
    if bash:
        _run([bash, "-n"], text, "bash -n")
        said.append("bash -n finds no error")
    if sbatch:
        _run([sbatch, "--test-only"], text, "sbatch --test-only")
        said.append("sbatch --test-only accepts it")
    return [*said, *(f"not checked by {name}: there is none here" for name, there in (("bash -n", bash), ("sbatch --test-only", sbatch)) if not there)]


def _run(argv: list[str], text: str, name: str) -> None:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise InputError(f"{name} refuses the script: {(done.stderr or done.stdout).strip()[-600:]}")


def check_k8s(text: str) -> list[str]:
    """Parses the manifest again and validates it against the structure of a Service and a Job. Raises InputError naming the place."""
    import jsonschema
    import yaml

    service, job = yaml.safe_load_all(text)
    for name, document, schema in (("Service", service, SERVICE_SCHEMA), ("Job", job, JOB_SCHEMA)):
        error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(document)), None)
        if error is not None:
            raise InputError(f"--k8s: the {name} is not valid at {'.'.join(map(str, error.absolute_path))}: {error.message}")
    pod = job["spec"]["template"]["spec"]
    mounts, volumes = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}, {v["name"] for v in pod["volumes"]}
    if mounts != volumes or service["spec"]["selector"] != {"job-name": job["metadata"]["name"]} or pod["subdomain"] != service["metadata"]["name"]:
        raise InputError("--k8s: names of volumes, of the job and of the service do not belong together")
    return ["the manifest parses, and is a v1 Service and a batch/v1 Job"]
