DROP TABLE leasehold.client_leases;
