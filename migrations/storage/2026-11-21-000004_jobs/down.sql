DROP TABLE leasehold.job_runs, leasehold.jobs;
