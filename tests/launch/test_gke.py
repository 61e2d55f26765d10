"""launch/gke.py: the JobSet is what Kubernetes' types take, and restarts as it should."""

import math
import re
import subprocess

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from launch_scripts import load

from olmo_jax.parallel.processes import Cluster, find_cluster

gke = load("gke")
BASE = ["--name=olmo", "--image=reg/olmo:1"]
TPU = [*BASE, "--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--slices=2", "--spot"]
GPU = [*BASE, "--accelerator=nvidia-h100-mega-80gb", "--nodes=4", "--service_account=trainer"]
TRAIN = ["--", "--gin_file=configs/olmo2/7b.gin", "--gin.Train.run_dir=gs://b/run"]

GPU_YAML = """\
# kubectl apply --filename=-
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: olmo
  namespace: default
spec:
  failurePolicy:
    maxRestarts: 30
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
      onJobFailureMessagePatterns:
      - rule at index 0$
    - name: interrupted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: 4
        completions: 4
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values:
              - 2
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values:
              - 75
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            serviceAccountName: trainer
            nodeSelector:
              cloud.google.com/gke-accelerator: nvidia-h100-mega-80gb
            tolerations:
            - key: nvidia.com/gpu
              operator: Exists
              effect: NoSchedule
            containers:
            - name: train
              image: reg/olmo:1
              command:
              - olmo-jax
              - train
              - --gin_file=configs/olmo2/7b.gin
              - --gin.Train.run_dir=gs://b/run
              env:
              - name: JOBSET_NAME
                value: olmo
              - name: REPLICATED_JOB_NAME
                value: workers
              - name: OLMO_JAX_PROCESSES
                value: '4'
              resources:
                limits:
                  nvidia.com/gpu: 8
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
"""


@pytest.fixture(autouse=True)
def no_kubectl(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)


def dry_run(capsys, options: list[str]) -> str:
    assert gke.main([*options, "--dry_run", *TRAIN]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_jobset_and_runs_nothing(capsys):
    assert dry_run(capsys, GPU) == GPU_YAML


@pytest.mark.parametrize("options", [TPU, TPU[:-2], GPU, [*GPU, "--spot"]])
def test_kubernetes_types_take_every_field(options, capsys):
    """Read into the types of the JobSet and Kubernetes APIs and written again, nothing is lost: an
    unknown or misspelt field would be, and a wrong type is refused."""
    jobset = yaml.safe_load(dry_run(capsys, options))
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 0
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset


@pytest.mark.parametrize(
    "accelerator, topology, options, hosts, chips",
    [
        ("tpu-v4-podslice", "2x2x4", [], 4, 4),
        ("tpu-v5-lite-podslice", "4x4", [], 4, 4),
        ("tpu-v5-lite-podslice", "1x1", [], 1, 1),
        ("tpu-v6e-slice", "2x4", ["--chips_per_host=8"], 1, 8),
        ("tpu-v6e-slice", "16x16", [], 64, 4),
        ("tpu7x", "4x4x8", [], 32, 4),
    ],
)
def test_a_slice_has_a_pod_for_each_host_and_its_chips(
    accelerator, topology, options, hosts, chips
):
    arguments = [*BASE, f"--accelerator={accelerator}", f"--topology={topology}", *options]
    jobset = gke.jobset(gke.parse([*arguments, "--slices=3"]))
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert workers["replicas"] == 3
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert hosts * chips == math.prod(map(int, topology.split("x")))


def test_the_pods_meet_at_the_first_pod():
    """Their variables are those that olmo-jax reads; Kubernetes adds JOB_COMPLETION_INDEX."""
    spec = gke.jobset(gke.parse(GPU))["spec"]["replicatedJobs"][0]["template"]["spec"]
    variables = spec["template"]["spec"]["containers"][0]["env"]
    pod = {v["name"]: v["value"] for v in variables} | {"JOB_COMPLETION_INDEX": "3"}
    assert find_cluster(pod) == Cluster("olmo-workers-0-0.olmo:8476", spec["completions"], 3)


@pytest.mark.parametrize("options", [TPU, GPU])
@pytest.mark.parametrize(
    "status, action",
    [
        (2, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        (76, "RestartJobSet"),
        (137, "RestartJobSet"),
        ("node taken away", "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_what_follows_an_exit_status(options, status, action):
    """By the rules as the documentation of Job and of JobSet gives them: the first that fits; a
    Job's message ends in the index of its rule."""
    spec = gke.jobset(gke.parse(options))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0  # the Job ends with its first pod
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if (
            status in rule["onExitCodes"]["values"]
            if "onExitCodes" in rule
            else status == "node taken away"
        ):
            reason, message = "PodFailurePolicy", f"matching FailJob rule at index {index}"
            break
    found = "RestartJobSet"
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            found = rule["action"]
            break
    assert found == action


@pytest.mark.parametrize(
    "options, says",
    [
        (["--accelerator=tpu-v3", "--topology=4x4"], "give one of tpu-v4-podslice"),
        (["--accelerator=tpu-v5p-slice"], "give chips as 4x4 or 4x4x4"),
        (["--accelerator=tpu-v5p-slice", "--topology=2x3x1"], "give --chips_per_host"),
        (["--accelerator=nvidia-b200", "--nodes=0"], "give at least 1"),
        (["--accelerator=nvidia-b200", "--name=Olmo_2"], "a letter first"),
    ],
)
def test_wrong_options_end_before_kubectl_in_one_line(options, says, capsys):
    with pytest.raises(SystemExit) as ended:
        gke.parse([*BASE, *options])
    assert ended.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
