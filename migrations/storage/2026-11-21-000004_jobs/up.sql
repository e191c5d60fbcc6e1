-- One row a job. All its slots until `handled_until` are settled: each was run, or passed over. The run that is under
-- way is a lease in this row, so that two never overlap; its columns change with every beat and are not indexed (HOT).
CREATE TABLE leasehold.jobs (
    name              TEXT COLLATE "C" PRIMARY KEY,
    schedule          TEXT NOT NULL,
    time_zone         TEXT NOT NULL,
    missed            TEXT NOT NULL CHECK (missed IN ('skip', 'run_once', 'run_all')),
    on_crash          TEXT NOT NULL CHECK (on_crash IN ('retry', 'skip')),
    paused            BOOLEAN NOT NULL DEFAULT false,
    registered_at     TIMESTAMPTZ NOT NULL,
    handled_until     TIMESTAMPTZ NOT NULL,
    -- The run that somebody has asked for and nobody has started yet.
    asked_id          UUID,
    asked_at          TIMESTAMPTZ,
    run_id            UUID,
    run_operation     TEXT,
    run_by            TEXT,
    run_acquired_at   TIMESTAMPTZ,
    run_expires_at    TIMESTAMPTZ,
    run_fencing_token BIGINT NOT NULL DEFAULT 0,
    CONSTRAINT jobs_asked_whole_or_not_at_all CHECK (num_nulls(asked_id, asked_at) IN (0, 2)),
    CONSTRAINT jobs_run_whole_or_not_at_all CHECK (
        num_nulls(run_id, run_operation, run_by, run_acquired_at, run_expires_at) IN (0, 5)
    ),
    CONSTRAINT jobs_runs_end_after_they_begin CHECK (run_expires_at > run_acquired_at)
) WITH (fillfactor = 50);

-- The runs, each with its own id, the last of each job in the order of `seq`. No outcome: it is under way, or its lease
-- ended and nobody has looked yet.
CREATE TABLE leasehold.job_runs (
    id          UUID PRIMARY KEY,
    job         TEXT COLLATE "C" NOT NULL REFERENCES leasehold.jobs (name) ON DELETE CASCADE,
    slot        TIMESTAMPTZ NOT NULL,
    attempt     INTEGER NOT NULL CHECK (attempt > 0),
    -- Somebody asked for it: the slot is when.
    asked       BOOLEAN NOT NULL,
    holder      TEXT NOT NULL,
    started_at  TIMESTAMPTZ NOT NULL,
    finished_at TIMESTAMPTZ,
    outcome     TEXT CHECK (outcome IN ('succeeded', 'failed', 'timed_out', 'interrupted')),
    error       TEXT,
    seq         BIGINT GENERATED ALWAYS AS IDENTITY,
    CONSTRAINT job_runs_finished_with_an_outcome CHECK (num_nulls(finished_at, outcome) IN (0, 2)),
    UNIQUE (job, seq)
);
-- A slot has one accepted outcome, or one run that may still have it.
CREATE UNIQUE INDEX job_runs_slot ON leasehold.job_runs (job, slot) WHERE outcome IS DISTINCT FROM 'interrupted';
CREATE UNIQUE INDEX job_runs_under_way ON leasehold.job_runs (job) WHERE outcome IS NULL;
