-- What was answered to writes that came with an Idempotency-Key, so that they are done once. A key is its credential's
-- own. There is no foreign key: what was answered outlives a credential by hours, and keeps nobody from going.
CREATE TABLE idempotency_keys (
    credential  UUID NOT NULL,
    key         TEXT COLLATE "C" NOT NULL,
    fingerprint BYTEA NOT NULL, -- of the method, the path, the query and the body
    status      SMALLINT NOT NULL,
    answer      BYTEA NOT NULL, -- JSON, or nothing
    tenant_id   TEXT COLLATE "C", -- whose data it tells of
    created_at  TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (credential, key)
);
CREATE INDEX idempotency_keys_tenant ON idempotency_keys (tenant_id);
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);

-- Whoever writes, by whatever program, passes the tenant's gate. What happens to a workspace's lock is no write of the
-- tenant.
SELECT leasehold.gate_table('workspaces', 'tenant_id',
    watched => ARRAY['tenant_id', 'name', 'description', 'version', 'created_at', 'updated_at', 'seq']::NAME[]);
SELECT leasehold.gate_table('default_config', 'tenant_id');
SELECT leasehold.gate_table('contexts', 'tenant_id');
SELECT leasehold.gate_table('versions', 'tenant_id');

-- A CHECK is evaluated at every update of its row, so also each time the row's lock is taken or given back: a name is
-- looked at when it is given, and a version is only ever raised from 0.
ALTER TABLE workspaces DROP CONSTRAINT workspaces_name_check, DROP CONSTRAINT workspaces_version_check;

CREATE FUNCTION refuse_workspace_name() RETURNS TRIGGER
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'no workspace can be called %', quote_literal(NEW.name)
        USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA, COLUMN = 'name';
END
$$;
CREATE TRIGGER workspaces_name BEFORE INSERT OR UPDATE OF name ON workspaces
    FOR EACH ROW WHEN (NEW.name !~ '^[a-z0-9][a-z0-9_-]{0,62}$') EXECUTE FUNCTION refuse_workspace_name();
