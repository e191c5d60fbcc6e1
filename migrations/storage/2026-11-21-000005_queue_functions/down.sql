DROP FUNCTION leasehold.claim_work(TEXT[], INTEGER, TEXT, BIGINT);
DROP FUNCTION leasehold.complete_work(BIGINT[], UUID[]);
DROP FUNCTION leasehold.put_work_back(BIGINT[], UUID[], BIGINT[], TEXT[], BOOLEAN);
DROP FUNCTION leasehold.fail_work(BIGINT[], UUID[], TEXT[]);
DROP FUNCTION leasehold.extend_work(BIGINT[], UUID[], BIGINT, BOOLEAN);
DROP FUNCTION leasehold.lock_claims(BIGINT[], UUID[]);
