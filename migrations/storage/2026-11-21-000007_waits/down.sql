DELETE FROM leasehold.presence WHERE waits;
ALTER TABLE leasehold.presence
    DROP CONSTRAINT presence_waits_without_session,
    DROP COLUMN waits,
    DROP COLUMN key_bits,
    DROP COLUMN key_space,
    ALTER COLUMN backend_pid SET NOT NULL;
