DROP TABLE leasehold.outbox;
DROP FUNCTION leasehold.gate_table(REGCLASS, NAME, NAME[]);
-- The functions that it made, one for each name of a column.
DO $$
DECLARE
    made REGPROCEDURE;
BEGIN
    FOR made IN SELECT oid FROM pg_proc
                WHERE pronamespace = 'leasehold'::regnamespace AND starts_with(proname, 'gate_by_')
    LOOP
        EXECUTE format('DROP FUNCTION %s', made);
    END LOOP;
END
$$;
DROP FUNCTION leasehold.drain_tenant(TEXT, INTEGER);
DROP FUNCTION leasehold.tenant_write_key(TEXT);
