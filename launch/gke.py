"""Trains on Google Kubernetes Engine: a JobSet over TPU slices, or over nodes with GPUs.

Writes the JobSet and hands it to `kubectl apply`; the cluster restarts it from then on. What
happens after an end depends on the training's status: launch/README.md. Needs JobSet 0.10 or newer
in the cluster, which first told one exit status from another.
"""

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

# Chips of a host in slices of several hosts: Google Cloud documentation, "Plan TPUs in GKE".
TPUS = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}
STATUS_RESTART, STATUS_USER_ERROR = 75, 2
JOB = "workers"  # the name of the one replicated job, and with the JobSet's of its pods


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; everything after -- goes to `olmo-jax train` as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python launch/gke.py --name=NAME --image=IMAGE "
        "(--accelerator=tpu-v5p-slice --topology=4x4x4 [--slices=N] | "
        "--accelerator=nvidia-h100-mega-80gb --nodes=N) [options] -- --gin_file=…",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--image", required=True, help="built by launch/docker/Dockerfile, in a registry")
    add("--accelerator", required=True, help="the nodes' label: a TPU's, or nvidia-…")
    add("--topology", help="TPU: chips of a slice, such as 4x4x4")
    add("--slices", type=int, default=1, help="TPU: joined by the data-centre network; default 1")
    add("--chips_per_host", type=int, help="TPU: default 4, or all of a smaller slice")
    add("--nodes", type=int, default=1, help="GPU: default 1")
    add("--gpus_per_node", type=int, default=8, help="GPU: default 8")
    add("--spot", action="store_true", help="cheap capacity that may be taken away")
    add("--namespace", default="default", help="default: default")
    add("--service_account", default="default", help="which may read and write the run's bucket")
    add("--max_restarts", type=int, default=30, help="after failures, in all; default 30")
    add("--dry_run", action="store_true", help="print the JobSet and what takes it; run nothing")
    add("train", nargs="*", metavar="-- ARGUMENTS", help="of olmo-jax train")
    options = parser.parse_args(arguments)
    gpu = options.accelerator.startswith("nvidia-")
    if not gpu and options.accelerator not in TPUS:
        known = ", ".join(TPUS)
        parser.error(f"--accelerator={options.accelerator}: give one of {known}, or nvidia-…")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        parser.error(f"--name={options.name}: give at most 40 of a-z, 0-9 and -, a letter first")
    for name in ("slices", "nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: give at least 1")
    if not gpu:
        if not re.fullmatch(r"\d+x\d+(x\d+)?", options.topology or ""):
            parser.error(f"--topology={options.topology}: give chips as 4x4 or 4x4x4")
        chips = math.prod(map(int, options.topology.split("x")))
        options.chips_per_host = options.chips_per_host or min(TPUS[options.accelerator], chips)
        if chips % options.chips_per_host:
            parser.error(
                f"--topology={options.topology} has {chips} chips, which {options.chips_per_host} "
                "a host doesn't divide: give --chips_per_host"
            )
        options.hosts = chips // options.chips_per_host
    return options


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one job a slice (GPU: one in all), one pod a host, one process a pod."""
    gpu = options.accelerator.startswith("nvidia-")
    metadata: dict[str, Any] = {"name": options.name, "namespace": options.namespace}
    if not gpu:  # each job has a node pool, which is a slice, to itself
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        metadata["annotations"] = exclusive
    hosts = options.nodes if gpu else options.hosts
    job = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # a host alone can't come back: the JobSet restarts all
        "podFailurePolicy": {
            "rules": [
                _exits(STATUS_USER_ERROR),
                _exits(STATUS_RESTART),
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": _gpu_pod(options) if gpu else _tpu_pod(options)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [  # of the first that fits; RestartJobSet, which counts, where none does
                    {
                        "name": "mistake",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": ["rule at index 0$"],
                    },
                    {
                        "name": "interrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": 1 if gpu else options.slices,
                    "template": {"spec": job},
                }
            ],
        },
    }


def _exits(status: int) -> dict[str, Any]:
    found = {"containerName": "train", "operator": "In", "values": [status]}
    return {"action": "FailJob", "onExitCodes": found}


def _tpu_pod(options: argparse.Namespace) -> dict[str, Any]:
    """GKE itself tells the hosts of a slice, and the slices of a JobSet, about one another.

    Privileged and as root, which the TPU's device files belong to (as XPK's pods are).
    """
    container = {
        "securityContext": {"privileged": True, "runAsUser": 0},
        "resources": {"limits": {"google.com/tpu": options.chips_per_host}},
    }
    labels = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    return _pod(options, container, labels, [])


def _gpu_pod(options: argparse.Namespace) -> dict[str, Any]:
    """The variables that parallel.processes.initialize() reads; one process for a node's GPUs."""
    container = {
        "env": [
            {"name": "JOBSET_NAME", "value": options.name},
            {"name": "REPLICATED_JOB_NAME", "value": JOB},
            {"name": "OLMO_JAX_PROCESSES", "value": str(options.nodes)},
        ],
        "resources": {"limits": {"nvidia.com/gpu": options.gpus_per_node}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    labels = {"cloud.google.com/gke-accelerator": options.accelerator}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # NCCL's; 64 MiB without
    return _pod(options, container, labels, [shm])


def _pod(
    options: argparse.Namespace,
    container: dict[str, Any],
    labels: dict[str, str],
    volumes: list[dict[str, Any]],
) -> dict[str, Any]:
    kind = next(iter(container["resources"]["limits"]))
    tolerations = [{"key": kind, "operator": "Exists", "effect": "NoSchedule"}]
    if options.spot:
        labels = {**labels, "cloud.google.com/gke-spot": "true"}
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    command = {
        "name": "train",
        "image": options.image,
        "command": ["olmo-jax", "train", *options.train],
    }
    return {
        "restartPolicy": "Never",  # which podFailurePolicy asks for
        "terminationGracePeriodSeconds": 300,  # to save; GKE grants spot nodes 15
        "hostNetwork": True,  # the pods' own network is slower between nodes
        "dnsPolicy": "ClusterFirstWithHostNet",
        "serviceAccountName": options.service_account,
        "nodeSelector": labels,
        "tolerations": tolerations,
        "containers": [{**command, **container}],
        **({"volumes": volumes} if volumes else {}),
    }


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    text = yaml.safe_dump(jobset(options), sort_keys=False)
    if options.dry_run:
        print(f"# kubectl apply --filename=-\n{text}", end="")
        return 0
    command = ["kubectl", "apply", "--filename=-"]
    try:
        return subprocess.run(command, input=text, text=True).returncode
    except FileNotFoundError:
        raise SystemExit("error: no kubectl here; install it with the Google Cloud CLI") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
