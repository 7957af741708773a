"""What is looked at before a run queues: files here, the cluster, where the run fits; and why a job waits."""
