// Package ginservice is a service on gin that calls byok-gate where a platform has to: before a workspace is written, before it is stopped
// for a restart, and before one of its secrets is saved. Its test needs no byok-gate.
package ginservice

import (
	"context"
	"crypto/rand"
	"net/http"
	"sync"

	"github.com/gin-gonic/gin"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// Workspace is an existing workspace.
type Workspace struct {
	ID      string               `json:"id"`
	Runtime string               `json:"runtime"`
	Model   string               `json:"model"`
	Billing byokgate.BillingMode `json:"billing_mode"`
	// Box is the running box. It changes with each restart.
	Box string `json:"box"`

	secrets byokgate.Found
}

// Service keeps workspaces in memory.
type Service struct {
	gate byokgate.Decider

	mu         sync.Mutex
	workspaces map[string]*Workspace
}

// New makes a service that uses this gate.
func New(gate byokgate.Decider) *Service {
	return &Service{gate: gate, workspaces: map[string]*Workspace{}}
}

// Handler has the routes.
func (s *Service) Handler() http.Handler {
	gin.SetMode(gin.ReleaseMode)
	router := gin.New()
	router.POST("/workspaces", s.create)
	router.POST("/workspaces/:id/restart", s.restart)
	router.PUT("/workspaces/:id/secrets/:name", s.putSecret)
	return router
}

func (s *Service) create(c *gin.Context) {
	var asked struct {
		Runtime string         `json:"runtime"`
		Model   string         `json:"model"`
		Secrets byokgate.Found `json:"secrets"`
	}
	if c.ShouldBindJSON(&asked) != nil {
		// The binder's error may quote the body, which holds secrets.
		c.JSON(http.StatusBadRequest, gin.H{"error": "invalid workspace payload"})
		return
	}
	// No row exists yet, so a refusal leaves none behind.
	allowed, passed := gatehttp.Decide(c.Writer, c.Request, s.gate, byokgate.Request{
		Checkpoint: byokgate.Create,
		Spec:       byokgate.Spec{Runtime: asked.Runtime, Model: asked.Model, Lookup: byokgate.Static(asked.Secrets, nil)},
	})
	if !passed {
		c.Abort()
		return
	}
	made := &Workspace{ID: rand.Text(), Runtime: asked.Runtime, Model: asked.Model, Billing: allowed.BillingMode(), Box: rand.Text(), secrets: asked.Secrets}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.workspaces[made.ID] = made
	c.JSON(http.StatusCreated, made)
}

func (s *Service) restart(c *gin.Context) {
	workspace, found := s.find(c)
	if !found {
		return
	}
	// The box keeps running until there is an allow for the next one.
	allowed, passed := gatehttp.Decide(c.Writer, c.Request, s.gate, byokgate.Request{
		Checkpoint: byokgate.Provision, MaxLivenessAge: byokgate.Fresh(), Spec: s.spec(workspace),
	})
	if !passed {
		c.Abort()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	workspace.Box, workspace.Billing = rand.Text(), allowed.BillingMode()
	c.JSON(http.StatusOK, workspace)
}

func (s *Service) putSecret(c *gin.Context) {
	workspace, found := s.find(c)
	if !found {
		return
	}
	var asked struct {
		Value byokgate.Secret `json:"value"`
	}
	if c.ShouldBindJSON(&asked) != nil || !asked.Value.Readable() {
		c.JSON(http.StatusBadRequest, gin.H{"error": "invalid secret payload"})
		return
	}
	name := c.Param("name")
	spec := s.spec(workspace)
	spec.Lookup = byokgate.Overlay(spec.Lookup, byokgate.Workspace, map[string]*byokgate.Secret{name: &asked.Value})
	// If the workspace is refused for another reason, this secret does no harm.
	_, err := s.gate.Decide(c.Request.Context(), byokgate.Request{Checkpoint: byokgate.Update, Spec: spec})
	if byokgate.Concerns(err, name) {
		gatehttp.Refuse(c.Writer, err)
		c.Abort()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	workspace.secrets[name] = asked.Value
	c.Status(http.StatusNoContent)
}

func (s *Service) find(c *gin.Context) (*Workspace, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	workspace, found := s.workspaces[c.Param("id")]
	if !found {
		c.JSON(http.StatusNotFound, gin.H{"error": "no such workspace"})
	}
	return workspace, found
}

// spec is a stored workspace.
func (s *Service) spec(workspace *Workspace) byokgate.Spec {
	return byokgate.Spec{
		WorkspaceID: workspace.ID, Runtime: workspace.Runtime, Model: workspace.Model,
		Lookup: func(_ context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
			found := byokgate.Found{}
			if scope != byokgate.Workspace {
				return found, nil
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, name := range names {
				if secret, exists := workspace.secrets[name]; exists {
					found[name] = secret
				}
			}
			return found, nil
		},
	}
}
