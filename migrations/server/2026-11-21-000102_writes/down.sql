DROP TRIGGER workspaces_name ON workspaces;
DROP FUNCTION refuse_workspace_name();
ALTER TABLE workspaces
    ADD CONSTRAINT workspaces_name_check CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    ADD CONSTRAINT workspaces_version_check CHECK (version >= 0);
DROP TRIGGER leasehold_gate ON versions;
DROP TRIGGER leasehold_gate ON contexts;
DROP TRIGGER leasehold_gate ON default_config;
DROP TRIGGER leasehold_gate ON workspaces;
DROP TABLE idempotency_keys;
