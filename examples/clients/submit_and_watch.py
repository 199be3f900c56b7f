"""Submits a job, watches it and fetches the adapter, with grpcio and the published .proto files alone.

pip install grpcio grpcio-tools
python submit_and_watch.py ENDPOINT.json JOB.yaml ADAPTER.safetensors
"""
import json
import pathlib
import sys

import grpc

endpoint_path, job_path, adapter_path = (pathlib.Path(arg) for arg in sys.argv[1:4])
endpoint = json.loads(endpoint_path.read_text())

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "proto"))
job_pb, job_grpc = grpc.protos_and_services("job.proto")
blob_pb, blob_grpc = grpc.protos_and_services("blob.proto")
metadata = [("authorization", f"Bearer {endpoint['token']}")]

with grpc.insecure_channel(endpoint["grpc"]) as channel:
    jobs = job_grpc.JobServiceStub(channel)
    blobs = blob_grpc.BlobServiceStub(channel)
    request = job_pb.SubmitRequest(
        job_file=job_path.read_text(), base_dir=str(job_path.resolve().parent)
    )
    job = jobs.Submit(request, metadata=metadata, timeout=60)
    for event in jobs.Watch(job_pb.WatchRequest(job_id=job.job_id), metadata=metadata):
        if event.HasField("step"):
            print(f"step {event.step.step} loss {event.step.loss:.4f}", flush=True)
    job = jobs.Get(job_pb.GetJobRequest(job_id=job.job_id), metadata=metadata, timeout=10)
    print(job.job_id, job_pb.JobState.Name(job.state), job.error.message)
    if job.state != job_pb.SUCCEEDED:
        sys.exit(1)
    with adapter_path.open("wb") as adapter:
        wanted = blob_pb.GetBlobRequest(digest=job.adapter_digest)
        for piece in blobs.Get(wanted, metadata=metadata):
            adapter.write(piece.data)
