// Package routers uses byok-gate in four routers: as middleware in chi and http.ServeMux, as a value in echo and fiber.
package routers

import (
	"maps"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/gofiber/fiber/v2"
	"github.com/labstack/echo/v4"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// Start makes a workspace, and needs the allow for it.
type Start func(byokgate.Allowed)

// question is the request of a create. It brings its secrets.
func question(runtime, model, key string) byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
		Runtime: runtime, Model: model, Lookup: byokgate.Static(byokgate.Found{"ACME_API_KEY": byokgate.NewSecret(key)}, nil),
	}}
}

func ask(r *http.Request) (byokgate.Request, error) {
	return question(r.FormValue("runtime"), r.FormValue("model"), r.FormValue("key")), nil
}

func created(start Start) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		allowed, passed := gatehttp.AllowedFor(r)
		if !passed {
			// The route has lost its middleware: nothing starts.
			gatehttp.Refuse(w, nil)
			return
		}
		start(allowed)
		w.WriteHeader(http.StatusCreated)
	}
}

// Chi has the gate before one route.
func Chi(gate byokgate.Decider, start Start) http.Handler {
	router := chi.NewRouter()
	router.With(gatehttp.Middleware(gate, ask)).Post("/workspaces", created(start))
	return router
}

// Mux has the gate around one handler.
func Mux(gate byokgate.Decider, start Start) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /workspaces", gatehttp.Middleware(gate, ask)(created(start)))
	return mux
}

// Echo answers with its own value.
func Echo(gate byokgate.Decider, start Start) *echo.Echo {
	server := echo.New()
	server.POST("/workspaces", func(c echo.Context) error {
		allowed, err := gate.Decide(c.Request().Context(), question(c.FormValue("runtime"), c.FormValue("model"), c.FormValue("key")))
		if err != nil {
			answer := gatehttp.AnswerFor(err)
			maps.Copy(c.Response().Header(), answer.Header)
			return c.Blob(answer.Status, answer.Header.Get("Content-Type"), answer.Body)
		}
		start(allowed)
		return c.NoContent(http.StatusCreated)
	})
	return server
}

// Fiber has no http.ResponseWriter at all. Its values are valid until the handler returns, and so is a decision's request.
func Fiber(gate byokgate.Decider, start Start) *fiber.App {
	server := fiber.New()
	server.Post("/workspaces", func(c *fiber.Ctx) error {
		allowed, err := gate.Decide(c.UserContext(), question(c.FormValue("runtime"), c.FormValue("model"), c.FormValue("key")))
		if err != nil {
			answer := gatehttp.AnswerFor(err)
			for name := range answer.Header {
				c.Set(name, answer.Header.Get(name))
			}
			return c.Status(answer.Status).Send(answer.Body)
		}
		start(allowed)
		return c.SendStatus(http.StatusCreated)
	})
	return server
}
