DROP TABLE credentials, versions, contexts, default_config, workspaces, tenants;
