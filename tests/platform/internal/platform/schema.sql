CREATE TABLE workspaces (
    seq             bigint GENERATED ALWAYS AS IDENTITY,
    id              text PRIMARY KEY,
    organization_id text NOT NULL,
    name            text NOT NULL,
    runtime         text NOT NULL,
    model           text NOT NULL,
    status          text NOT NULL,
    billing_mode    text NOT NULL,
    -- The decision by which it may run. byok-gate's log has the reasons.
    decision_id     text NOT NULL,
    -- Which box runs it: a new one for each start. Empty while none does.
    box             text NOT NULL DEFAULT '',
    -- Why it was last refused. Empty since it was last allowed.
    last_error      text NOT NULL DEFAULT '',
    -- What a look at the running box's credential last came to. Empty until something was reported.
    credential_health text NOT NULL DEFAULT ''
);

-- What the sweep remembers of each workspace. No secret.
CREATE TABLE sweep_records (
    workspace_id text PRIMARY KEY REFERENCES workspaces ON DELETE CASCADE,
    record       jsonb NOT NULL
);

-- The two scopes. The values are encrypted, each bound to its own place.
CREATE TABLE workspace_secrets (
    workspace_id    text NOT NULL REFERENCES workspaces ON DELETE CASCADE,
    name            text NOT NULL,
    encrypted_value bytea NOT NULL,
    PRIMARY KEY (workspace_id, name)
);
CREATE TABLE organization_secrets (
    organization_id text NOT NULL,
    name            text NOT NULL,
    encrypted_value bytea NOT NULL,
    PRIMARY KEY (organization_id, name)
);
