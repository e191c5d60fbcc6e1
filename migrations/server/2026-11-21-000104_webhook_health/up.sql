-- What was found when a webhook was last looked at: the HTTP status, or NULL when there was no answer.
ALTER TABLE webhooks
    ADD COLUMN last_checked_at TIMESTAMPTZ,
    ADD COLUMN last_status     SMALLINT,
    ADD CONSTRAINT webhooks_status_of_a_check CHECK (last_status IS NULL OR last_checked_at IS NOT NULL);
