ALTER TABLE webhooks DROP COLUMN last_checked_at, DROP COLUMN last_status;
