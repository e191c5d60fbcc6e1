-- Presence also tells who waits, where no session of the server does it for them, and which key stands for a name, so
-- that what the server shows as a number gets its name back.
ALTER TABLE leasehold.presence
    ADD COLUMN waits BOOLEAN NOT NULL DEFAULT false,
    ADD COLUMN key_bits BIGINT,
    ADD COLUMN key_space SMALLINT,
    ALTER COLUMN backend_pid DROP NOT NULL,
    ADD CONSTRAINT presence_waits_without_session CHECK (waits = (backend_pid IS NULL));
