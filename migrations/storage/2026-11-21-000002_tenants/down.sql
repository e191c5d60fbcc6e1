DROP TABLE leasehold.outbox;
DROP FUNCTION leasehold.gate_table(REGCLASS, NAME, NAME[]);
DROP FUNCTION leasehold.drain_tenant(TEXT, INTEGER);
DROP FUNCTION leasehold.tenant_write_key(TEXT);
